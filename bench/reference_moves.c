// SPDX-License-Identifier: Apache-2.0
/*
 * The plainest loop there is over the move, to compare the native loops with.
 *
 *     reference_moves ROUNDS        for each line it is sent, prints attempts per second and how many had which errno
 *
 * What the locking test of the kernel's sev_migrate_tests does: three SEV VMs of four vCPUs, three threads, thread i
 * calls move(vm i <- vm n mod 3) for n = 0, 1, ... All three VMs have a context, so that every attempt is refused;
 * what is raced is the taking of the locks. Time runs from the first thread's first attempt to the last one's last.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

#define VMS 3
#define VCPUS 4
#define ERRNOS 4096

struct thread {
	pthread_t id;
	int vm;
	uint64_t began, ended;
	uint64_t errnos[ERRNOS];
} __attribute__((aligned(64)));

static int vms[VMS];
static long rounds;
static pthread_barrier_t barrier;

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static int must(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
}

static void sev(int vm, int platform, uint32_t id, void *data)
{
	struct kvm_sev_cmd command = { .id = id, .data = (uintptr_t)data, .sev_fd = (uint32_t)platform };

	must(ioctl(vm, KVM_MEMORY_ENCRYPT_OP, &command), "KVM_MEMORY_ENCRYPT_OP");
}

static int create(int kvm, int platform)
{
	struct kvm_sev_launch_start start = { .policy = 0 };
	int vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");

	sev(vm, platform, KVM_SEV_INIT, NULL);
	for (int i = 0; i < VCPUS; i++)
		must(ioctl(vm, KVM_CREATE_VCPU, i), "KVM_CREATE_VCPU");
	sev(vm, platform, KVM_SEV_LAUNCH_START, &start);
	return vm;
}

static int move(int destination, int source)
{
	struct kvm_enable_cap cap = { .cap = KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, .args = { (unsigned int)source } };

	return ioctl(destination, KVM_ENABLE_CAP, &cap) < 0 ? errno : 0;
}

static void *work(void *argument)
{
	struct thread *thread = argument;

	pthread_barrier_wait(&barrier);
	thread->began = now();
	for (long n = 0; n < rounds * VMS; n++)
		thread->errnos[move(vms[thread->vm], vms[n % VMS])]++;
	thread->ended = now();
	return NULL;
}

static void run(struct thread *threads)
{
	memset(threads, 0, VMS * sizeof(*threads));
	pthread_barrier_init(&barrier, NULL, VMS);
	for (int i = 0; i < VMS; i++) {
		threads[i].vm = i;
		if (pthread_create(&threads[i].id, NULL, work, &threads[i])) {
			fprintf(stderr, "pthread_create failed\n");
			exit(1);
		}
	}
	for (int i = 0; i < VMS; i++)
		pthread_join(threads[i].id, NULL);
	pthread_barrier_destroy(&barrier);
}

static void report(const struct thread *threads)
{
	uint64_t began = threads[0].began, ended = threads[0].ended;

	for (int i = 1; i < VMS; i++) {
		began = threads[i].began < began ? threads[i].began : began;
		ended = threads[i].ended > ended ? threads[i].ended : ended;
	}
	printf("%.0f", (double)rounds * VMS * VMS * 1e9 / (double)(ended - began));
	for (int e = 0; e < ERRNOS; e++) {
		uint64_t count = 0;

		for (int i = 0; i < VMS; i++)
			count += threads[i].errnos[e];
		if (count)
			printf(" %d:%llu", e, (unsigned long long)count);
	}
	printf("\n");
	fflush(stdout);
}

int main(int count, char **words)
{
	static struct thread threads[VMS];
	char line[16];
	int kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm"), platform = must(open("/dev/sev", O_RDWR), "/dev/sev");

	rounds = count == 2 ? atol(words[1]) : 0;
	if (rounds <= 0) {
		fprintf(stderr, "usage: reference_moves ROUNDS\n");
		return 64;
	}
	for (int i = 0; i < VMS; i++)
		vms[i] = create(kvm, platform);
	while (fgets(line, sizeof(line), stdin)) {
		run(threads);
		report(threads);
	}
	return 0;
}
