"""What the doctor looks for: each check reads the facts of a case, and yields findings."""
