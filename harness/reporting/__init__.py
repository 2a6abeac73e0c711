"""Tables, figures and findings from records, published numbers beside ours."""
