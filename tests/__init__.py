"""Tests, in folders that mirror the packages; a package so that they can share ``tests.cases`` and the like."""
