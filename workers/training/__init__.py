"""How sam_nano is trained: drawn scenes, losses, stages. Nothing here runs in a job."""
