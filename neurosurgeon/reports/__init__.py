"""The output for users: lines, tables, JSON documents, plots, drawings and spreadsheets."""
