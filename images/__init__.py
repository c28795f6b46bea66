"""Folders, archives and pictures of images; no PyTorch."""
