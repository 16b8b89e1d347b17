"""The dataset that `renee-ray quickstart` trains on, with its data card."""
