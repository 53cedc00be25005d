"""What a fold needs and says: policies, inputs, original weights, records, measurements, the report."""
