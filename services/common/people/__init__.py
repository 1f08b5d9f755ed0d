"""People: who signed in with an OpenID Connect issuer, and what they may do."""
