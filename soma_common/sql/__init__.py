"""The library's SQL: named blocks in .sql files, and the migrations."""
