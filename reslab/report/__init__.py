"""The page: records -> figures -> one offline HTML file."""
