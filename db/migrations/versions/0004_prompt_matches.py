"""The assets that a prompt file's keys mean, when a key is not the asset's own: prompt_match, job.matched.

Both are empty for existing jobs. A dispatcher matches the prompts of those that are not done.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job", sa.Column("matched", postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    op.create_table(
        "prompt_match",
        sa.Column("asset_id", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(collation="C"), nullable=False),
        sa.ForeignKeyConstraint(["asset_id"], ["asset.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("asset_id", "key"),
    )


def downgrade() -> None:
    op.drop_table("prompt_match")
    op.drop_column("job", "matched")
