"""The models a job may name: one file a family, a registry, and where weights come from."""
