# SPDX-License-Identifier: Apache-2.0
"""Adapters for other training libraries. Each module names what it needs and imports it only when it is used."""
