"""renee_ray: distributed training of extreme multi-label text classifiers on Ray."""
