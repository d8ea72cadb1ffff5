"""The feature store: its one reader, and `python -m features.store` to verify and to inspect one."""

from features.store.mixture import Mixture, open_store
from features.store.reader import Store
from features.store.spec import SCHEMA_VERSION, Feature, StoreSpec, shard_name

__all__ = ["SCHEMA_VERSION", "Feature", "Mixture", "Store", "StoreSpec", "open_store", "shard_name"]
