"""Answers for clips that are in no store yet: what predict --corpus and serve share."""
