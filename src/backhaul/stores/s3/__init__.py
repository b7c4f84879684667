"""S3 and what speaks its language, through boto3's client."""
