"""Parts of the evaluate job: conditions of the input, inference, scores, calibration, comparison, the report."""
