"""What CLCR is compared with, on the same stems, the same hierarchy and the same training."""
