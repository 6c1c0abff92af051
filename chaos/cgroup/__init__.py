# SPDX-License-Identifier: Apache-2.0
"""The unified hierarchy and the misc controller, on top of cgroupspy.

`nodes` teaches cgroupspy, which knows neither, what their files are called and how they read; `group.Cgroup` is the
typed face that the rest of the house uses. A cgroup is named by its path in the file system, passed in, so that tests
may give it a directory of their own.
"""
