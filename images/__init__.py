"""Sampled images as files: PNG folders and archives, the record of how they were made, pictures of many."""
