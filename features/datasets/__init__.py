"""Official benchmarks as manifests: from the folders and lists that their authors give out to a corpus of ours.

Each adapter reads one layout, knows the official split, and yields a row per clip of the official lists; nothing is
downloaded and no list is part of this package. Where a benchmark has no validation split, a share of its training clips
is held out, the same ones on every machine.
"""
