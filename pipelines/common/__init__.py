"""What every job needs: options, errors in one line, a cluster."""
