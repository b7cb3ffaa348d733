# SPDX-License-Identifier: Apache-2.0
"""The loops over the caller's memory, as opaque ops. They know no formula: a backend computes the rows they hand it."""
