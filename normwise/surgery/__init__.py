"""Operations on finished models; each returns a record of what it did, proves what it claims, and can be undone."""

from __future__ import annotations
