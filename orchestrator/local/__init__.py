"""Everything on one machine: `run`, its own Postgres, `doctor`."""
