# SPDX-License-Identifier: Apache-2.0
"""Other people's training stacks. Each module says what it needs, and imports it only where it is used."""
