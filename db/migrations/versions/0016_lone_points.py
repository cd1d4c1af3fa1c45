"""Nothing changes in the tables. From here on a mask's lone point is stored as a string, which db/mask_prompt.py reads.

An older version would give such a string to a reader as the mask's prompt. With this number it refuses the database.
Older workers that still run read no prompts.
"""

from __future__ import annotations

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    pass


def downgrade() -> None:
    op.execute(
        """UPDATE mask SET prompt = jsonb_build_object('points', jsonb_build_array(jsonb_build_array(
               split_part(prompt #>> '{}', ',', 1)::numeric, split_part(prompt #>> '{}', ',', 2)::numeric, 1)))
           WHERE jsonb_typeof(prompt) = 'string'"""
    )
