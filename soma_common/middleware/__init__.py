"""Requests and what they are done for: tenant, correlation, trace and baggage in and out of web applications."""
