"""From images to features, and from features to distances between sets of images."""
