"""Sources of assets: folders and S3 prefixes. Only this package uses boto3."""
