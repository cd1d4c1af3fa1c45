"""Annotated tasks that wait for their prediction to become known: ls_unjudged.

Until here such annotations were passed over for ever. So each project is read once more from its beginning.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "ls_unjudged",
        sa.Column("server", sa.Text(), nullable=False),
        sa.Column("project_id", sa.BigInteger(), nullable=False),
        sa.Column("task_id", sa.BigInteger(), nullable=False),
        sa.Column("asset_uid", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("server", "project_id", "task_id"),
    )
    op.execute("UPDATE ls_pull SET watermark = '2000-01-01T00:00:00Z'")


def downgrade() -> None:
    op.drop_table("ls_unjudged")
