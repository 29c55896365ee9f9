"""What users see: lines, tables, JSON documents, pictures and spreadsheets."""
