#!/usr/bin/env bash
# The MLflow server of a cluster: runs in PostgreSQL, artifacts on S3 by way of the server, so that clients need no keys.
#   DATABASE=postgresql://USER:PASSWORD@HOST/DB ARTIFACTS=s3://BUCKET/FOLDER infra/cluster/mlflow_server.sh [more of `mlflow server`]
# AWS_* name the storage (AWS_ENDPOINT_URL: one that is not AWS). It has no users: keep its port inside the cluster's
# network. Clients that reach it by a name and not by a private address: MLFLOW_SERVER_ALLOWED_HOSTS=NAME:5000,...
set -euo pipefail
: "${DATABASE:?set it to postgresql://USER:PASSWORD@HOST/DB}" "${ARTIFACTS:?set it to s3://BUCKET/FOLDER}"
cd "$(dirname "$0")/../.."
[ -x .venv/bin/python ] && PATH=$PWD/.venv/bin:$PATH
python -c "import psycopg, boto3" 2>/dev/null || { echo "error: pip install 'psycopg[binary]' boto3" >&2; exit 1; }
# Arguments would show the database's password to everybody on this machine (ps); the environment does not.
export MLFLOW_BACKEND_STORE_URI=${DATABASE/#postgresql:/postgresql+psycopg:} MLFLOW_ARTIFACTS_DESTINATION=$ARTIFACTS
export MLFLOW_S3_ENDPOINT_URL=${MLFLOW_S3_ENDPOINT_URL:-${AWS_ENDPOINT_URL:-}}
[ -n "$MLFLOW_S3_ENDPOINT_URL" ] || unset MLFLOW_S3_ENDPOINT_URL
# Its own jobs (evaluation by judges) take seven more processes; nothing here uses them.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=${MLFLOW_SERVER_ENABLE_JOB_EXECUTION:-false}
exec python -m mlflow server --host 0.0.0.0 --port 5000 "$@"
