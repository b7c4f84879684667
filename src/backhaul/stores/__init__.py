"""Places that keep objects: local directories and S3, and the wrappers that every store can wear."""
