// SPDX-License-Identifier: Apache-2.0
/*
 * CLOCK_MONOTONIC for tight loops.
 *
 * In the lab a reading through the vDSO costs 110 ns of a loop whose attempted move takes 2.4 us: emulated CPUs are
 * slow at the half dozen of indirect jumps in it. The time stamp counter costs 15. So a thread reads the clock itself
 * every third of a millisecond only, and goes on from there by the counter, at the rate it has seen between the two
 * before. Whenever it comes back to the clock it sees how far off it was, and the worst of that is reported.
 *
 * This wants a counter that is the same on all CPUs, which is so when it is the kernel's own clock source.
 */
#ifndef SEVCHAOS_CLOCK_H
#define SEVCHAOS_CLOCK_H

#include <stdint.h>
#include <time.h>
#include <x86intrin.h>

#define REACH		(1u << 20)	/* ticks of the counter until the clock is read again */
#define BASELINE	2000000u	/* ns over which the rate is told, at least: true to 30 of them, so 15 ppm */
#define RENEWED		1000000000u	/* ns, at most: NTP may change the rate */
#define TRIES		3		/* whoever is preempted between clock and counter tries again */

struct clock {
	uint64_t reach;			/* 0: read the clock each time */
	uint64_t ticks, ns;		/* the last reading of both */
	uint64_t rate;			/* ns in 2^32 ticks */
	uint64_t origin_ticks, origin_ns;	/* a reading long ago */
	uint64_t latest;		/* what was last told */
	uint64_t *error;		/* where to note by how many ns it was off at worst */
	int usable;			/* the counter */
};

static inline uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static inline uint64_t ticks(void)
{
	_mm_lfence();	/* not before what comes before it */
	return __rdtsc();
}

static inline uint64_t by_counter(const struct clock *clock, uint64_t since)
{
	return clock->ns + (since * clock->rate >> 32);
}

static inline void note_error(struct clock *clock, uint64_t ticks, uint64_t ns)
{
	uint64_t told = by_counter(clock, ticks - clock->ticks);
	uint64_t off = told > ns ? told - ns : ns - told;

	if (ticks - clock->ticks < 2 * REACH && off > *clock->error)
		*clock->error = off;
}

static inline void find_rate(struct clock *clock)
{
	uint64_t since = clock->ns - clock->origin_ns;

	if (since < BASELINE)
		return;
	clock->rate = (uint64_t)(((unsigned __int128)since << 32) / (clock->ticks - clock->origin_ticks));
	clock->reach = REACH;
	if (since < RENEWED)
		return;
	clock->origin_ticks = clock->ticks;
	clock->origin_ns = clock->ns;
}

/* Read the clock, and the counter at the same moment. */
static uint64_t clock_read(struct clock *clock)
{
	uint64_t best = UINT64_MAX, at = 0, ns = 0, time = 0;

	if (!clock->usable)
		return now();
	for (int i = 0; i < TRIES; i++) {
		uint64_t before = ticks(), took;

		time = now();
		took = ticks() - before;
		if (took < best) {
			best = took;
			at = before + took / 2;
			ns = time;
		}
	}
	if (clock->reach)
		note_error(clock, at, ns);
	clock->ticks = at;
	clock->ns = ns;
	find_rate(clock);
	return time;
}

static inline void clock_start(struct clock *clock, int usable, uint64_t *error)
{
	*clock = (struct clock){ .usable = usable, .error = error };
	clock_read(clock);
	clock->origin_ticks = clock->ticks;
	clock->origin_ns = clock->ns;
}

/* CLOCK_MONOTONIC in ns, never less than before. */
static inline uint64_t clock_tell(struct clock *clock)
{
	uint64_t time, since = clock->reach ? ticks() - clock->ticks : 0;

	time = since < clock->reach ? by_counter(clock, since) : clock_read(clock);
	if (time < clock->latest)
		return clock->latest;
	return clock->latest = time;
}

#endif
