"""Programs that show the library at work; each of them runs, and the tests check what it prints."""
