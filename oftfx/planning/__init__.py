"""What a user asks for, and what is planned for it: rules, plans, and the program that passes work on."""
