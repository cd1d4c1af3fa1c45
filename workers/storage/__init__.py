"""Sources of assets: folders and S3 prefixes. The one door to boto3."""
