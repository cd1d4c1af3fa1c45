"""Interactive review: a service that answers a reviewer's clicks in Label Studio with masks. It never loads torch."""
