// SPDX-License-Identifier: Apache-2.0
/*
 * An ioctl, or a close, in which the nth fault point fails: an allocation of the kernel's, or a copy of its from or to
 * the caller. Linux counts them down from the number in /proc/thread-self/fail-nth in every system call of that thread,
 * so between the number and the call there is nothing here that makes another one.
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define TRIES	4

static int write_number(int file, uint32_t number)
{
	char text[16];
	int length = snprintf(text, sizeof(text), "%u", number);

	return pwrite(file, text, (size_t)length, 0) == length ? 0 : errno;
}

/* What is left of the count. To ask is a system call with a copy too: if that one failed, it was the nth itself, and
 * one was left when the call was over.
 */
static int read_left(int file, uint32_t *left)
{
	char text[16] = "";
	ssize_t length = pread(file, text, sizeof(text) - 1, 0);

	*left = 1;
	if (length < 0)
		return errno == EFAULT ? 0 : errno;
	*left = (uint32_t)strtoul(text, NULL, 10);
	return 0;
}

static int end_count(int file, uint32_t *left)
{
	int wrong = read_left(file, left);

	for (int tries = 0; tries < TRIES && write_number(file, 0) == EFAULT; tries++)
		;	/* it was the nth, and is counted no more */
	return wrong;
}

/* Both return 0, or an errno if it cannot be done; `error` is then the call's, and `left` is 0 if a point failed. */
int ioctl_failing(int file, uint32_t nth, int fd, unsigned long request, void *argument, int *result, int *error,
		  uint32_t *left)
{
	int wrong = write_number(file, nth);

	if (wrong)
		return wrong;
	*result = ioctl(fd, request, argument);
	*error = *result < 0 ? errno : 0;
	return end_count(file, left);
}

/* What the last close of a file has the kernel do, it does before it returns. */
int close_failing(int file, uint32_t nth, int fd, int *result, int *error, uint32_t *left)
{
	const int wrong = write_number(file, nth);
	int late;

	*result = close(fd);	/* whether it can be counted or not: its owner takes it for closed */
	*error = *result < 0 ? errno : 0;
	late = end_count(file, left);
	return wrong ? wrong : late;
}
