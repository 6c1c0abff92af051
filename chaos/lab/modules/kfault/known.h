/* SPDX-License-Identifier: GPL-2.0-only */
#include <linux/bits.h>

/*
 * What may be asked of which function. All of these are called with nothing but mutexes held, so that they may be
 * slept in, which is checked at each call all the same.
 *
 *	SLEEP	hold, delay
 *	FAIL	return of an error, -4095 to -1: its callers clean up after one
 *	SKIP	return of anything: to leave it out does no more harm than a wrong account, a leak, or a refusal of
 *		the firmware's. Not so sev_vm_destroy(), which takes a mirror off its owner's list, nor whatever
 *		takes a lock.
 *
 * docs/kfault.md says which of them are there in which kernel; what the compiler has inlined is not.
 */
#define SLEEP	BIT(0)
#define FAIL	BIT(1)
#define SKIP	BIT(2)

static const struct {
	const char *name;
	unsigned int may;
} known[] = {
	/* charges */
	{ "misc_cg_try_charge", SLEEP | FAIL | SKIP },
	{ "misc_cg_uncharge", SLEEP | SKIP },
	/* a move and a mirror, in the order of the way through them */
	{ "kvm_vm_ioctl_enable_cap", SLEEP | FAIL },
	{ "sev_vm_move_enc_context_from", SLEEP | FAIL | SKIP },
	{ "sev_vm_copy_enc_context_from", SLEEP | FAIL | SKIP },
	{ "sev_lock_two_vms", SLEEP | FAIL },
	{ "sev_lock_vcpus_for_migration", SLEEP | FAIL },
	{ "kvm_lock_all_vcpus", SLEEP | FAIL },
	{ "sev_check_source_vcpus", SLEEP | FAIL },
	{ "sev_migrate_from", SLEEP },
	{ "sev_init_vmcb", SLEEP },
	{ "sev_unlock_vcpus_for_migration", SLEEP },
	{ "kvm_unlock_all_vcpus", SLEEP },
	/* a context's beginning and its end */
	{ "__sev_guest_init", SLEEP | FAIL },
	{ "sev_guest_init", SLEEP | FAIL },
	{ "sev_asid_new", SLEEP | FAIL },
	{ "sev_platform_init", SLEEP | FAIL },
	{ "sev_launch_start", SLEEP | FAIL },
	{ "sev_flush_asids", SLEEP | FAIL },
	{ "sev_asid_free", SLEEP | SKIP },
	{ "sev_vm_destroy", SLEEP },
	{ "svm_vm_destroy", SLEEP },
	{ "kvm_arch_destroy_vm", SLEEP },
	{ "kvm_destroy_vm", SLEEP },
	{ "kvm_vm_release", SLEEP | SKIP },
	/* a vCPU's */
	{ "kvm_arch_vcpu_precreate", SLEEP | FAIL },
	{ "kvm_arch_vcpu_create", SLEEP | FAIL },
	{ "sev_free_vcpu", SLEEP | SKIP },
	/* regions */
	{ "sev_mem_enc_register_region", SLEEP | FAIL },
	{ "sev_mem_enc_unregister_region", SLEEP | FAIL },
	{ "sev_pin_memory", SLEEP },	/* it returns a pointer */
	/* the firmware */
	{ "sev_guest_activate", SLEEP | FAIL },
	{ "sev_guest_deactivate", SLEEP | FAIL | SKIP },
	{ "sev_guest_decommission", SLEEP | FAIL | SKIP },
	{ "sev_guest_df_flush", SLEEP | FAIL | SKIP },
	{ "sev_issue_cmd_external_user", SLEEP | FAIL },
	{ "__sev_do_cmd_locked", SLEEP | FAIL },
	/* where its state is kept (init_ex_path of ccp) */
	{ "kernel_write", SLEEP },
};
