"""One trainable model and one optimizer step: what every trainer shares."""
