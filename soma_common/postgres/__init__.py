"""The one edge to PostgreSQL: everything that imports asyncpg or psycopg lives here."""
