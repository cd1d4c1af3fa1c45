"""Label Studio: projects, publishing, review. Its client is the one door to the server."""
