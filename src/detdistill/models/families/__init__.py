"""The architectures, one file each, and what one-stage and two-stage detectors share."""
