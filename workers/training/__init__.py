"""The training of sam_nano: drawn scenes, losses, stages. Nothing here runs in a job."""
