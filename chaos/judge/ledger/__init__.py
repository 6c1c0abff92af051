# SPDX-License-Identifier: Apache-2.0
"""What a history leaves possible, moment by moment: charges, owners and the firmware's contexts."""
