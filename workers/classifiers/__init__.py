"""Classifiers: models that give masks their class. Their words come with the job."""
