"""The job that a POST with an Idempotency-Key makes, known before it is made"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("idempotency", sa.Column("job_id", sa.String(length=64), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("idempotency", "job_id")
