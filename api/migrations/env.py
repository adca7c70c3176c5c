"""Run by alembic: migrations on the connection that `database.migrate` opened, or on $BITRANK_DATABASE_URL."""

from alembic import context
from sqlalchemy import Connection

from api.settings import Settings
from api.storage.database import Base, make_engine


def run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with make_engine(Settings.from_environment().url).connect() as opened:
        run(opened)
        opened.commit()
