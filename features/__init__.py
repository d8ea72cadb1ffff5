"""Raw media to numbers on disk: corpora, decoders and the feature store. Knows no model, no training, no tracking."""
