// SPDX-License-Identifier: GPL-2.0-only
/*
 * sevshim: gives an emulated CPU the looks of a SEV host, and lends the mailbox device the identity of a PSP.
 *
 * Load it after kvm and before ccp and kvm_amd. Four things, none undone: the drivers loaded afterwards have the
 * answers compiled into their call sites, so there is no exit function.
 *
 *  1. Feature bits. TCG emulates SVM with nested paging but none of what kvm_amd insists on before it looks for
 *     SEV: nrips, decode assists, flush by ASID, and for SEV-ES on 6.12 LBR virtualisation. A CPU that comes
 *     online is asked what it has, and what it has not is taken from all: so it is given to it again.
 *  2. CPUID leaf 0x8000001F, through pv_ops: a module's calls of cpuid() are patched, when it is loaded, to
 *     whatever pv_ops.cpu.cpuid points to at that time.
 *  3. The PCI identity 1022:14ca in the struct pci_dev of QEMU's ivshmem device, so that the real ccp driver
 *     binds to it. Only the kernel's copy of the ids changes; configuration space stays as it is.
 *
 *  4. Breakpoints that are gone. The kernel patches a jump label by way of an int3 in its first byte. QEMU's store
 *     of the new byte first drops what was translated from the old one, and then stores: a CPU that comes by in
 *     between translates the int3 again, keeps it, and the kernel dies of a breakpoint that nobody set ("Oops:
 *     int3"). Here what memory has there is carried out, and the CPU is made to look again.
 */
#include <linux/cpuhotplug.h>
#include <linux/ftrace.h>
#include <linux/kdebug.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/percpu.h>
#include <linux/ptrace.h>
#include <linux/version.h>
#include <asm/cpufeature.h>
#include <asm/paravirt.h>
#include <asm/processor.h>
#include <asm/text-patching.h>

#define LEAF_ENCRYPTION	0x8000001f
#define EAX_SEV		BIT(1)
#define EAX_SEV_ES	BIT(3)

#define IVSHMEM_VENDOR	0x1af4
#define IVSHMEM_DEVICE	0x1110
#define PSP_VENDOR	0x1022
#define PSP_DEVICE	0x14ca	/* Genoa: pspv4 with the sevv2 registers, BAR 2 */

static unsigned int sev_asids = 8;
module_param(sev_asids, uint, 0444);
MODULE_PARM_DESC(sev_asids, "ASIDs for SEV guests");

static unsigned int es_asids = 7;
module_param(es_asids, uint, 0444);
MODULE_PARM_DESC(es_asids, "ASIDs for SEV-ES guests; 0 leaves SEV-ES out");

static unsigned int c_bit = 51;
module_param(c_bit, uint, 0444);
MODULE_PARM_DESC(c_bit, "position of the C-bit in page table entries");

static typeof(pv_ops.cpu.cpuid) real_cpuid;

static void sev_cpuid(unsigned int *eax, unsigned int *ebx,
		      unsigned int *ecx, unsigned int *edx)
{
	unsigned int leaf = *eax;

	real_cpuid(eax, ebx, ecx, edx);
	if (leaf != LEAF_ENCRYPTION)
		return;

	*eax = EAX_SEV | (es_asids ? EAX_SEV_ES : 0);
	*ebx = c_bit;
	*ecx = es_asids + sev_asids;	/* highest ASID of all */
	*edx = es_asids + 1;		/* lowest ASID for plain SEV */
}

static unsigned long gone;
module_param(gone, ulong, 0444);
MODULE_PARM_DESC(gone, "breakpoints that were met when they were gone");

/* The breakpoint that a CPU last went back to, and how many times in a row. */
struct met {
	unsigned long ip;
	unsigned int times;
};
static DEFINE_PER_CPU(struct met, met);
#define MET_OFTEN 1000

/*
 * A store, though it changes nothing, makes QEMU drop what it translated, most times: where it takes the page for one
 * without code it does not look. The kernel's text is read-only.
 */
static void translate_again(u8 *instruction, u8 byte)
{
	unsigned long cr0;

	asm volatile("mov %%cr0, %0" : "=r" (cr0));
	asm volatile("mov %0, %%cr0" : : "r" (cr0 & ~X86_CR0_WP) : "memory");
	cmpxchg(instruction, byte, byte);
	asm volatile("mov %0, %%cr0" : : "r" (cr0) : "memory");
}

static void is_gone(u8 *instruction, u8 byte)
{
	if (!gone++)
		pr_info("sevshim: QEMU kept a breakpoint that is gone, at %pS\n", instruction);
	translate_again(instruction, byte);
}

/* Do what the instruction does, of those that the kernel patches in. Returns whether it is one of them. */
static bool carry_out(struct pt_regs *regs, const u8 *instruction)
{
	unsigned long at = (unsigned long)instruction;

	switch (instruction[0]) {
	case 0x0f:	/* nopl 0x0(%rax,%rax,1) */
		if (instruction[1] != 0x1f || instruction[2] != 0x44)
			return false;
		regs->ip = at + 5;
		return true;
	case 0x66:	/* xchg %ax,%ax */
		if (instruction[1] != 0x90)
			return false;
		regs->ip = at + 2;
		return true;
	case JMP8_INSN_OPCODE:
		int3_emulate_jmp(regs, at + JMP8_INSN_SIZE + (s8)instruction[1]);
		return true;
	case JMP32_INSN_OPCODE:
		int3_emulate_jmp(regs, at + JMP32_INSN_SIZE + *(const s32 *)(instruction + 1));
		return true;
	case CALL_INSN_OPCODE:	/* int3_emulate_call() has other parameters from 7.3 on */
		int3_emulate_push(regs, at + CALL_INSN_SIZE);
		int3_emulate_jmp(regs, at + CALL_INSN_SIZE + *(const s32 *)(instruction + 1));
		return true;
	}
	return false;
}

/*
 * Called for an int3 that is neither a kprobe's nor part of a patch under way. If memory has one there all the same,
 * the next patch has just begun, and its own handler will know it: the CPU goes back to it, as to what is not known
 * how to carry out, but not for ever.
 */
static int met_breakpoint(struct notifier_block *self, unsigned long event, void *data)
{
	struct pt_regs *regs = ((struct die_args *)data)->regs;
	struct met *last = this_cpu_ptr(&met);
	u8 *instruction;
	u8 byte;

	if (event != DIE_INT3 || user_mode(regs))
		return NOTIFY_DONE;

	instruction = (u8 *)regs->ip - INT3_INSN_SIZE;
	byte = READ_ONCE(*instruction);
	if (byte != INT3_INSN_OPCODE) {
		is_gone(instruction, byte);
		if (carry_out(regs, instruction))
			return NOTIFY_STOP;
	}

	last->times = last->ip == regs->ip ? last->times + 1 : 0;
	last->ip = regs->ip;
	if (last->times >= MET_OFTEN)
		return NOTIFY_DONE;
	regs->ip = (unsigned long)instruction;
	return NOTIFY_STOP;
}

static struct notifier_block breakpoints = {
	.notifier_call = met_breakpoint,
	.priority = INT_MAX,
};

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 12, 0)
/*
 * Older kernels (6.1; 6.12 does not) have kprobe_int3_handler() send the CPU back to an int3 that memory does not have
 * any more, before anybody else is asked. On hardware it then finds what memory has; here it finds the int3 that QEMU
 * keeps, for ever, with interrupts off, and the other CPUs with it. So we come before that function.
 *
 * It takes the int3 to be one byte before regs->ip, and will go on there: at what carry_out() has found, therefore.
 */
static void before_kprobes(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *op,
			   struct ftrace_regs *fregs)
{
	struct pt_regs *regs = (struct pt_regs *)ftrace_get_regs(fregs)->di;
	u8 *instruction;
	u8 byte;

	if (user_mode(regs))
		return;
	instruction = (u8 *)regs->ip - INT3_INSN_SIZE;
	byte = READ_ONCE(*instruction);
	if (byte == INT3_INSN_OPCODE)
		return;
	is_gone(instruction, byte);
	if (carry_out(regs, instruction))
		regs->ip += INT3_INSN_SIZE;
}

static struct ftrace_ops kprobes = {
	.func = before_kprobes,
	.flags = FTRACE_OPS_FL_SAVE_REGS,
};

static int __init come_before_kprobes(void)
{
	static char name[] __initdata = "kprobe_int3_handler";
	int error = ftrace_set_filter(&kprobes, name, strlen(name), 1);

	return error ?: register_ftrace_function(&kprobes);
}
#else
static int __init come_before_kprobes(void)
{
	return 0;
}
#endif

static void give_features(struct cpuinfo_x86 *c)
{
	set_cpu_cap(c, X86_FEATURE_NRIPS);
	set_cpu_cap(c, X86_FEATURE_FLUSHBYASID);
	set_cpu_cap(c, X86_FEATURE_DECODEASSISTS);
	set_cpu_cap(c, X86_FEATURE_LBRV);
	set_cpu_cap(c, X86_FEATURE_SEV);
	if (es_asids)
		set_cpu_cap(c, X86_FEATURE_SEV_ES);
}

static int came_online(unsigned int cpu)
{
	give_features(&boot_cpu_data);
	give_features(&cpu_data(cpu));
	return 0;
}

static int __init sevshim_init(void)
{
	struct pci_dev *mailbox;
	int cpu, error;

	mailbox = pci_get_device(IVSHMEM_VENDOR, IVSHMEM_DEVICE, NULL);
	if (!mailbox) {
		pr_err("sevshim: no mailbox device %04x:%04x\n",
		       IVSHMEM_VENDOR, IVSHMEM_DEVICE);
		return -ENODEV;
	}
	error = register_die_notifier(&breakpoints);
	if (!error)
		error = come_before_kprobes();
	if (error) {
		unregister_die_notifier(&breakpoints);
		pci_dev_put(mailbox);
		return error;
	}

	mailbox->vendor = PSP_VENDOR;
	mailbox->device = PSP_DEVICE;
	pci_dev_put(mailbox);

	give_features(&boot_cpu_data);
	for_each_possible_cpu(cpu)
		give_features(&cpu_data(cpu));
	error = cpuhp_setup_state_nocalls(CPUHP_AP_ONLINE_DYN, "sevshim:online", came_online, NULL);
	if (error < 0)
		pr_warn("sevshim: CPUs that come online will be no SEV host's: error %d\n", error);

	real_cpuid = pv_ops.cpu.cpuid;
	pv_ops.cpu.cpuid = sev_cpuid;

	pr_info("sevshim: %u SEV and %u SEV-ES ASIDs\n", sev_asids, es_asids);
	return 0;
}
module_init(sevshim_init);

MODULE_DESCRIPTION("A SEV host's CPU features and PSP identity for an emulated machine");
MODULE_LICENSE("GPL v2");
